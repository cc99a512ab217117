"""The ledger: every place where MSD changes vLLM, with its reason and when it can go.

`python -m vllm_msd.vllm_plugin.patches` prints it as the table of docs/architecture.md.
"""

from vllm_msd.vllm_plugin.patches.patching import SUPPORTED_VERSIONS, Patch

PATCHES: tuple[Patch, ...] = (
    Patch(
        name="speculative-config",
        target="vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        parameters=dict.fromkeys(
            SUPPORTED_VERSIONS, ("self", "target_model_config", "target_parallel_config")
        ),
        make="vllm_msd.vllm_plugin.configuration.engine_args:wrap_create_speculative_config",
        what="Turns method `msd` into vLLM's `eagle` with the draft found, and runs the guards.",
        why="vLLM's speculative methods are a closed list and its config forbids other keys.",
        remove_when="vLLM lets a plugin register a speculative method.",
    ),
    Patch(
        name="draft-hf-config",
        target="vllm.config.speculative:SpeculativeConfig.hf_config_override",
        parameters={
            "0.32": ("hf_config",),
            "0.33": ("hf_config", "transformers_mtp_overrides"),
        },
        make="vllm_msd.vllm_plugin.configuration.engine_args:wrap_hf_config_override",
        what="Replaces the config of an MSD checkpoint by a Llama or Qwen2 one of our draft class.",
        why="Published drafts call themselves `llava` or `qwen2_vl` and read as whole targets.",
        remove_when="vLLM lets a plugin register a speculative method or a draft config override.",
        used_as=(("vllm.config.speculative", "SpeculativeConfig.hf_config_override"),),
    ),
    Patch(
        name="command-line",
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        parameters=dict.fromkeys(SUPPORTED_VERSIONS, ("parser",)),
        make="vllm_msd.vllm_plugin.configuration.engine_args:wrap_add_cli_args",
        what="Adds `--speculative-model`, `--num-speculative-tokens` and `--spec-method msd`.",
        why="The flags are generated from vLLM's own config fields.",
        remove_when="vLLM lets a plugin add engine arguments.",
        used_as=(("vllm.engine.arg_utils", "parser = EngineArgs.add_cli_args(parser)"),),
    ),
    Patch(
        name="draft-slots",
        target="vllm.config.vllm:VllmConfig.num_lookahead_tokens",
        parameters=dict.fromkeys(SUPPORTED_VERSIONS, ("self",)),
        make="vllm_msd.vllm_plugin.configuration.tree_settings:wrap_num_lookahead_tokens",
        what="Keeps a KV slot for each row that grows a tree.",
        why="vLLM keeps one for each drafted token; a tree's rows may be more than its nodes.",
        remove_when="vLLM lets a speculator say how many slots it needs.",
        used_as=(
            (
                "vllm.v1.core.sched.scheduler",
                "self.num_lookahead_tokens = vllm_config.num_lookahead_tokens",
            ),
        ),
    ),
    Patch(
        name="capture-sizes",
        target="vllm.config.vllm:VllmConfig._set_cudagraph_sizes",
        parameters=dict.fromkeys(SUPPORTED_VERSIONS, ("self",)),
        make="vllm_msd.vllm_plugin.configuration.capture_sizes:wrap_set_cudagraph_sizes",
        what="Adds CUDA graphs of batches with trees, where the user gave no sizes.",
        why="vLLM's sizes end at 512 rows, eight requests of 61; larger batches would run eagerly.",
        remove_when="vLLM's sizes follow the number of requests whatever they draft.",
        used_as=(("vllm.config.vllm", "self._set_cudagraph_sizes()"),),
    ),
    Patch(
        name="schedule-graphs",
        target="vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager._init_candidates",
        parameters=dict.fromkeys(SUPPORTED_VERSIONS, ("self",)),
        make="vllm_msd.vllm_plugin.configuration.capture_sizes:wrap_init_candidates",
        what="With a schedule of drafted tokens, lets a batch pad the next graph of requests with "
        "as many rows as its own have.",
        why="vLLM looks at graphs of the next number of rows alone. Where those are for requests "
        "with other numbers of rows, the step runs eagerly, and a schedule's threshold costs more "
        "than its rows save.",
        remove_when="vLLM finds the next graph of a batch's own kind.",
        used_as=(("vllm.v1.worker.gpu.cudagraph_utils", "self._init_candidates()"),),
    ),
    Patch(
        name="v1-drafter",
        target="vllm.v1.worker.worker_base:WorkerWrapperBase.init_device",
        parameters=dict.fromkeys(SUPPORTED_VERSIONS, ("self",)),
        make="vllm_msd.vllm_plugin.runners:wrap_init_device",
        what="Gives Model Runner V1 the MSD drafter in place of the EAGLE one it has just built; "
        "for draft trees, puts our subclass in the place of the CPU's runner. Tells Model Runner "
        "V2 with LoRA how many rows of logits each request has, and with trees which kernels to "
        "compile at start. With LoRA on the CPU under 0.32, keeps adapters off the rows of "
        "requests without one.",
        why="The EAGLE drafter of V1 feeds the draft a wrong row at the end of a prompt chunk, "
        "M-RoPE positions and the target's adapters, and stops drafting for all when one request "
        "nears max_model_len. vLLM verifies chains only. V2 knows the adapter of one row a "
        "request; its registry of kernels takes ours once the runner is there. The CPU's LoRA of "
        "0.32 gives rows without an adapter the one in the last place.",
        remove_when="Model Runner V1 is gone from every supported version.",
        used_as=(
            (
                "vllm.v1.worker.gpu_model_runner",
                "self.drafter = EagleProposer(self.vllm_config, self.device, self)",
            ),
            (
                "vllm.v1.worker.cpu_worker",
                'self.model_runner = CPUModelRunner(self.vllm_config, torch.device("cpu"))',
            ),
            ("vllm.v1.worker.gpu.model_runner", "self.lora_state.make_lora_inputs("),
            (
                "vllm.v1.worker.gpu.model_runner",
                "self.jit_warmup_registry = JitWarmupRegistry(vllm_config)",
            ),
        ),
    ),
    Patch(
        name="v2-speculator",
        target="vllm.v1.worker.gpu.spec_decode:init_speculator",
        parameters=dict.fromkeys(SUPPORTED_VERSIONS, ("vllm_config", "device", "req_states")),
        make="vllm_msd.vllm_plugin.runners:wrap_init_speculator",
        what="Gives Model Runner V2 our speculators: of trees, or of chains.",
        why="vLLM drafts and verifies chains, and in full CUDA graphs reads prompts without their "
        "images; which speculator it builds is a closed list.",
        remove_when="vLLM lets a plugin register a speculator.",
        used_as=(
            (
                "vllm.v1.worker.gpu.model_runner",
                "from vllm.v1.worker.gpu.spec_decode import init_speculator",
            ),
            ("vllm.v1.worker.gpu.model_runner", "self.speculator = init_speculator("),
            # Requests with drafts come first in a batch, see `gpu.split`.
            ("vllm.v1.worker.gpu.model_runner", "not draft_tokens.get(r),"),
        ),
    ),
    Patch(
        name="cpu-sampling",
        target="vllm.utils.cpu_triton_utils:_expand_kernel_impl",
        parameters=dict.fromkeys(
            SUPPORTED_VERSIONS,
            (
                "output",
                "input_val",
                "cu_num_tokens",
                "replace_from",
                "replace_to",
                "MAX_NUM_TOKENS",
            ),
        ),
        make="vllm_msd.vllm_plugin.cpu.sampling_mends:wrap_expand_kernel",
        what="Writes each request's temperature, top-p and top-k to its drafted tokens.",
        why="Model Runner V1 on the CPU otherwise verifies sampled drafts with uninitialised ones.",
        remove_when="vLLM issue 55005 is closed in every supported version.",
        used_as=(("vllm.platforms.cpu", "cpu_tl._expand_kernel_impl"),),
    ),
    Patch(
        name="cpu-top-k",
        target="vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_only",
        parameters=dict.fromkeys(SUPPORTED_VERSIONS, ("logits", "k")),
        make="vllm_msd.vllm_plugin.cpu.sampling_mends:wrap_apply_top_k_only",
        what="Lets top-k sampling pass when a step has no drafted tokens.",
        why="Without top-p, Model Runner V1 on the CPU fails on the empty batch; the engine dies.",
        remove_when="vLLM's apply_top_k_only accepts an empty batch in every supported version.",
        used_as=(("vllm.v1.sample.ops.topk_topp_sampler", "return apply_top_k_only(logits, k)"),),
    ),
    Patch(
        name="cpu-seeds",
        target="vllm.v1.worker.worker_base:WorkerWrapperBase.initialize_from_config",
        parameters=dict.fromkeys(SUPPORTED_VERSIONS, ("self", "kv_cache_configs")),
        make="vllm_msd.vllm_plugin.cpu.sampling_mends:wrap_initialize_from_config",
        what="Samples after a chunk of an unfinished prompt without its request's seed; an MSD "
        "engine then says what its CPU lacks.",
        why="Model Runner V1 winds the seed's generator back, which no CPU generator can; the "
        "engine dies, with and without speculation.",
        remove_when="vLLM winds no CPU generator back in any supported version.",
        used_as=(("vllm.v1.worker.gpu_model_runner", "gen.set_offset(gen.get_offset() - 4)"),),
    ),
    Patch(
        name="image-read-ahead",
        target="vllm.v1.core.sched.scheduler:Scheduler._try_schedule_encoder_inputs",
        parameters=dict.fromkeys(
            SUPPORTED_VERSIONS,
            (
                "self",
                "request",
                "num_computed_tokens",
                "num_new_tokens",
                "encoder_compute_budget",
                "shift_computed_tokens",
            ),
        ),
        make="vllm_msd.vllm_plugin.scheduling:wrap_try_schedule_encoder_inputs",
        what="Ends a prompt's chunk so that the draft can read the next image's first row, and "
        "lets the prompt go on when that image must wait for the one before it.",
        why="The draft reads one row ahead. vLLM 0.32 waits forever for both of two adjacent "
        "images when the encoder cache holds only one; 0.33 gives that row the placeholder's "
        "embedding.",
        remove_when="Every supported version ends chunks a row before such an image, and moves on.",
    ),
    Patch(
        name="request-drafts",
        target="vllm.v1.core.sched.scheduler:Scheduler.schedule",
        parameters=dict.fromkeys(SUPPORTED_VERSIONS, ("self", "throttle_prefills")),
        make="vllm_msd.vllm_plugin.request_drafts:wrap_schedule",
        what="Under Model Runner V2, gives the scheduler the sizes of the moment where they are "
        "left to the plugin, cuts a request's drafts to what its own `msd` options allow, and asks "
        "for none where no request of a step wants any.",
        why="vLLM's schedule of drafted tokens does not move, and it drafts and verifies the same "
        "number for all requests of a step.",
        remove_when="vLLM lets a request say how many tokens are drafted for it, and a plugin "
        "choose how many a step drafts.",
        used_as=(
            ("vllm.v1.core.sched.scheduler", "spec_token_ids = request.spec_token_ids"),
            (
                "vllm.v1.core.sched.scheduler",
                "num_spec_tokens_to_schedule = self.dynamic_sd_lookup[",
            ),
            (
                "vllm.v1.worker.gpu.model_runner",
                "num_spec_tokens = self.execute_model_state.num_spec_tokens_to_schedule",
            ),
        ),
    ),
    Patch(
        name="step-costs",
        target="vllm.v1.engine.core:EngineCore._initialize_kv_caches",
        parameters=dict.fromkeys(SUPPORTED_VERSIONS, ("self", "vllm_config")),
        make="vllm_msd.vllm_plugin.scheduled_sizes:wrap_initialize_kv_caches",
        what="Measures what steps cost, once the workers are ready, where sizes are left to the "
        "plugin.",
        why="The scheduler decides by what the workers measure, and vLLM has no hook between the "
        "two.",
        remove_when="vLLM lets a plugin choose how many tokens a step drafts.",
        used_as=(
            ("vllm.v1.engine.core", "kv_cache_config = self._initialize_kv_caches(vllm_config)"),
        ),
    ),
    Patch(
        name="accepted-tokens",
        target="vllm.v1.core.sched.scheduler:Scheduler.make_spec_decoding_stats",
        parameters=dict.fromkeys(
            SUPPORTED_VERSIONS,
            (
                "self",
                "spec_decoding_stats",
                "num_draft_tokens",
                "num_accepted_tokens",
                "num_invalid_spec_tokens",
                "request_id",
            ),
        ),
        make="vllm_msd.vllm_plugin.scheduled_sizes:wrap_make_spec_decoding_stats",
        what="Notes what each verification accepted, where sizes are left to the plugin.",
        why="vLLM counts them for its statistics alone, which may be switched off.",
        remove_when="As above.",
        used_as=(
            (
                "vllm.v1.core.sched.scheduler",
                "spec_decoding_stats = self.make_spec_decoding_stats(",
            ),
        ),
    ),
    Patch(
        name="sampling-params",
        target="vllm.sampling_params:SamplingParams._validate_spec_decode",
        parameters=dict.fromkeys(SUPPORTED_VERSIONS, ("self", "speculative_config")),
        make="vllm_msd.vllm_plugin.configuration.sampling_params:wrap_validate_spec_decode",
        what="Lets min_p and logit_bias through to an engine that drafts trees; refuses what a "
        "request cannot mean by its own `msd` options.",
        why="vLLM refuses them with any speculation; trees are sampled row by row, so they hold. "
        "It checks no arguments of plugins.",
        remove_when="vLLM's rejection samplers of both runners apply them.",
    ),
    Patch(
        name="tree-series",
        target="vllm.v1.spec_decode.metrics:SpecDecodingProm.__init__",
        parameters=dict.fromkeys(
            SUPPORTED_VERSIONS,
            ("self", "speculative_config", "labelnames", "per_engine_labelvalues", "is_diffusion"),
        ),
        make="vllm_msd.vllm_plugin.metrics:wrap_init",
        what="Adds Prometheus series about trees to an MSD engine's: `vllm:msd_...`.",
        why="vLLM's official stat logger plugins are left out offline, and turn statistics on for "
        "engines that have them off and may not speculate at all.",
        remove_when="vLLM lets a plugin add series to an engine's own.",
    ),
    Patch(
        name="tree-series-step",
        target="vllm.v1.spec_decode.metrics:SpecDecodingProm.observe",
        parameters=dict.fromkeys(SUPPORTED_VERSIONS, ("self", "spec_decoding_stats", "engine_idx")),
        make="vllm_msd.vllm_plugin.metrics:wrap_observe",
        what="Counts a step's verifications in the series about trees.",
        why="As above: these are the figures of the step.",
        remove_when="As above.",
        used_as=(("vllm.v1.metrics.loggers", "self.spec_decoding_prom.observe("),),
    ),
    Patch(
        name="drafted-nodes",
        target="vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids",
        parameters=dict.fromkeys(SUPPORTED_VERSIONS, ("self", "draft_token_ids")),
        make="vllm_msd.vllm_plugin.drafted_nodes:wrap_update_draft_token_ids",
        what="Where sizes vary, counts the nodes that a worker of Model Runner V1 drafted.",
        why="The scheduler sees those that are verified.",
        remove_when="vLLM counts drafted tokens beside verified ones.",
        used_as=(("vllm.v1.engine.core", "self.scheduler.update_draft_token_ids("),),
    ),
    Patch(
        name="drafted-nodes-step",
        target="vllm.v1.core.sched.scheduler:Scheduler.make_stats",
        parameters=dict.fromkeys(
            SUPPORTED_VERSIONS,
            (
                "self",
                "spec_decoding_stats",
                "kv_connector_stats",
                "cudagraph_stats",
                "perf_stats",
                "ec_connector_stats",
            ),
        ),
        make="vllm_msd.vllm_plugin.drafted_nodes:wrap_make_stats",
        what="Sends that count to the front end with the step's figures.",
        why="Their fields are a closed list; it rides behind the sizes by position.",
        remove_when="As above.",
        used_as=(
            ("vllm.v1.spec_decode.metrics", "num_draft_tokens_per_pos: list[int]"),
            ("vllm.v1.core.sched.scheduler", "self.make_stats("),
        ),
    ),
)


def markdown_table(patches: tuple[Patch, ...] = PATCHES) -> str:
    """The list as docs/architecture.md shows it, between its markers."""
    rows = ["| patch | where | what | why | goes when |", "|---|---|---|---|---|"]
    rows += [f"| {p.name} | `{p.target}` | {p.what} | {p.why} | {p.remove_when} |" for p in patches]
    return "\n".join(["<!-- patches:begin -->", *rows, "<!-- patches:end -->"])
