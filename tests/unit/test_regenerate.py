"""`vllm-msd regenerate` against a server without a model: what it asks, writes, retries, gives up.

A real target, with kills of either side, is in ``tests/vllm/test_regenerate.py``.
"""

import base64
import json
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest

from tests.common.chat_server import ChatServer, completion, digest, error
from tests.common.conversations import write_conversations
from vllm_msd.cli.main import main
from vllm_msd.errors import ConfigError, DataError, StorageError
from vllm_msd.regenerate import RegenerateSettings, regenerate
from vllm_msd.regenerate.chat import ServerGoneError
from vllm_msd.training.data.index import RecordFile

COUNT = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve conversations of two turns, an image in the first."""
    return write_conversations(tmp_path_factory.mktemp("data"), COUNT)[1]


@pytest.fixture
def server():
    with ChatServer() as found:
        yield found


@pytest.fixture
def settings(data, server, tmp_path):
    return RegenerateSettings(data, tmp_path / "out.json", server=server.url, concurrency=4)


def rows(settings):
    return json.loads(settings.output.read_text())


def failures(settings):
    path = settings.output.with_suffix(".failed.json")
    return json.loads(path.read_text()) if path.exists() else []


def journal(settings):
    return settings.output.with_name(settings.output.name + ".journal")


def test_replies_are_the_servers_and_the_rest_stays(settings, server, data):
    counts = regenerate(settings)
    assert (counts.conversations, counts.left_out, counts.tokens) == (COUNT, 0, 2 * 7 * COUNT)
    old, new = json.loads(data.read_text()), rows(settings)
    assert [row["id"] for row in new] == [row["id"] for row in old]
    for before, after in zip(old, new, strict=True):
        replies = [turn["value"] for turn in after["conversations"][1::2]]
        assert all(reply.startswith("it is ") for reply in replies)
        for turn, reply in zip(before["conversations"][1::2], replies, strict=True):
            turn["value"] = reply
        assert after == before
    assert len(RecordFile(settings.output)) == COUNT  # training reads it
    assert not failures(settings) and not journal(settings).exists()


def test_requests_have_the_image_earlier_turns_and_the_settings(settings, server, data):
    regenerate(replace(settings, concurrency=1, temperature=0.5, top_p=0.9, max_tokens=33))
    first, second = server.asked[:2]
    image = base64.b64encode((data.parent / "0.png").read_bytes()).decode()
    assert first["messages"] == [
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            {"type": "text", "text": "what is 0 and 0?"}]}]  # fmt: skip
    reply = rows(settings)[0]["conversations"][1]["value"]
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": reply},
        {"role": "user", "content": "and then?"},
    ]
    sampling = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 33, "model": "stand-in"}
    assert first.items() >= sampling.items()
    seeds = Counter(body["seed"] for body in server.asked)
    assert len(seeds) == 2 * COUNT


def test_greedy_requests_have_no_seed(settings, server):
    regenerate(settings)
    assert all("seed" not in body for body in server.asked)


def test_samples_differ_and_are_the_same_again(settings, tmp_path):
    sampled = replace(settings, samples=3, temperature=1.0, output=tmp_path / "a.jsonl")
    again = replace(sampled, concurrency=1, output=tmp_path / "b.jsonl")
    for each in (sampled, again):
        assert regenerate(each).conversations == 3 * COUNT
    text = sampled.output.read_text()
    assert text == again.output.read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert [(row["id"], row["sample"]) for row in found] == [
        (n, k) for n in range(COUNT) for k in range(3)
    ]
    assert len({json.dumps(row["conversations"]) for row in found}) == 3 * COUNT
    other = replace(sampled, seed=1, output=tmp_path / "c.jsonl")
    regenerate(other)
    assert other.output.read_text() != text


def test_what_fails_is_listed_and_the_others_are_written(settings, server, data, tmp_path):
    good = json.loads(data.read_text())[:6]
    bad = [{"id": "film", "video": "a.mp4", "conversations": good[0]["conversations"]},
           {"id": "gone", **good[0], "image": "gone.png"}]  # fmt: skip
    good[1]["conversations"][0]["value"] = "<image>\nrefuse this"
    good[2]["conversations"][2]["value"] = "refuse that"
    good[3]["conversations"][0]["value"] = "<image>\nsay nothing"
    good[4]["conversations"][0]["value"] = "<image>\nsay the placeholder"
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps([bad[0], good[0], {**bad[1], "id": "gone"}, *good[1:]], indent=0))

    def respond(body):
        question = json.dumps(body["messages"][-1])
        if "refuse" in question:
            return error(400, "too long for me")
        if "say" in question:
            return completion(" \n" if "nothing" in question else "an <image>")
        return digest(body)

    server.respond = respond
    mixed = replace(settings, data=path, image_root=[str(data.parent)])
    counts = regenerate(mixed)
    assert (counts.conversations, counts.left_out, counts.unanswered) == (3, 5, 0)
    assert [row["id"] for row in rows(mixed)] == [0, 2, 5]
    assert len(rows(mixed)[1]["conversations"]) == 2
    reasons = {row.get("id", "?"): row["reason"] for row in failures(mixed)}
    assert reasons.keys() == {"?", "gone", 1, 2, 3, 4}
    assert "video is not trained on" in reasons["?"] and "no such file" in reasons["gone"]
    assert reasons[1] == "400 too long for me"
    assert reasons[2] == "ends after 1 replies: 400 too long for me"
    assert "reply is empty" in reasons[3] and "<image> inside a reply" in reasons[4]
    assert not journal(mixed).exists()


@pytest.mark.parametrize(
    "answer",
    [
        error(500, "out of order"),
        error(503, "busy"),
        error(429, "slowly"),
        (200, {"choices": []}),
        completion("as far as I ca", "abort"),
    ],
    ids=["500", "503", "429", "nonsense", "abort"],
)
def test_what_may_pass_is_tried_again(settings, server, answer):
    first = iter(range(3))
    server.respond = lambda body: digest(body) if next(first, None) is None else answer
    assert regenerate(settings).conversations == COUNT
    assert len(server.asked) == 2 * COUNT + 3
    assert all("it is" in t["value"] for r in rows(settings) for t in r["conversations"][1::2])


def test_without_an_answer_the_same_command_tries_again(settings, server, capsys):
    """The output holds the rest meanwhile, and at the end it is that of an unbroken run."""
    server.respond = lambda body: (
        error(500, "out of order") if "what is 3" in json.dumps(body["messages"]) else digest(body)
    )
    command = ["regenerate", "--data", str(settings.data), "--output", str(settings.output)]
    command += ["--server", server.url + "/v1/", "--retries", "1"]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "1 conversations got no answer" in said.err
    assert json.loads(said.out)["unanswered"] == 1
    assert [row["id"] for row in rows(settings)] == [n for n in range(COUNT) if n != 3]
    assert failures(settings) == [
        {"line": failures(settings)[0]["line"], "id": 3,
         "reason": "no answer after 2 attempts: 500 out of order"}]  # fmt: skip
    server.respond, server.asked = digest, []
    assert main(command) == 0
    assert len(server.asked) == 2 and not failures(settings) and not journal(settings).exists()
    whole = replace(settings, output=settings.output.with_name("whole.json"))
    regenerate(whole)
    assert settings.output.read_bytes() == whole.output.read_bytes()


def test_a_server_that_is_away_is_waited_for(settings, server):
    """It goes in the middle of the run, and comes back at the same address."""
    port, back = server.server_port, []
    answered = iter(range(9))

    def respond(body):
        if next(answered, None) is None and not back:
            back.append(None)
            threading.Thread(target=restart).start()
        return digest(body)

    def restart():
        server.__exit__()
        threading.Event().wait(1.0)
        back[0] = ChatServer(port).__enter__()

    server.respond = respond
    assert regenerate(settings).conversations == COUNT
    assert back[0].asked
    back[0].__exit__()


def test_a_server_that_stays_away_ends_the_run_and_keeps_what_is_done(settings, server):
    answered = iter(range(9))

    def respond(body):
        if next(answered, None) is None:
            threading.Thread(target=server.__exit__).start()
        return digest(body)

    server.respond = respond
    with pytest.raises(ServerGoneError, match="same command again: it goes on"):
        regenerate(replace(settings, wait=1))
    assert not settings.output.exists()
    done = len(journal(settings).read_text().splitlines()) - 1
    assert 0 < done < COUNT
    with ChatServer() as other:  # at another address
        counts = regenerate(replace(settings, server=other.url))
        assert counts.kept == done and len(other.asked) == 2 * (COUNT - done)
    assert [row["id"] for row in rows(settings)] == list(range(COUNT))


def test_cut_lines_of_the_journal_are_made_again(settings, server):
    regenerate(settings)
    expected = settings.output.read_bytes()
    server.respond = lambda body: error(500, "") if "what is 9" in str(body) else digest(body)
    regenerate(replace(settings, force=True, retries=0))
    path = journal(settings)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == COUNT  # the settings, and all but one
    path.write_bytes(b"".join([*lines[:4], b"\0\0\n", *lines[5:-1], lines[-1][:-5]]))
    server.respond, server.asked = digest, []
    assert regenerate(settings).kept == COUNT - 3
    assert len(server.asked) == 2 * 3
    assert settings.output.read_bytes() == expected


def test_other_settings_do_not_go_on_with_a_journal(settings, server, data, tmp_path):
    server.respond = lambda body: error(500, "")
    copy = tmp_path / "copy.json"
    copy.write_bytes(data.read_bytes())
    settings = replace(settings, data=copy, image_root=[str(data.parent)], retries=0)
    server.respond = lambda body: error(500, "") if "what is 9" in str(body) else digest(body)
    regenerate(settings)
    assert journal(settings).exists()
    for other, said in (
        (replace(settings, temperature=0.7), "temperature: 0.0, now 0.7"),
        (replace(settings, max_tokens=3), "max_tokens: 512, now 3"),
        (replace(settings, model="another"), "model: 'stand-in', now 'another'"),
    ):
        with pytest.raises(ConfigError, match=said):
            regenerate(other)
    copy.write_text(data.read_text() + "\n")
    with pytest.raises(ConfigError, match="data: "):
        regenerate(settings)
    assert regenerate(replace(settings, max_tokens=3, force=True)).kept == 0


def test_two_runs_do_not_write_one_output(settings, server):
    going = threading.Event()
    server.respond = lambda body: digest(body) if going.wait(30) else None
    run = threading.Thread(target=regenerate, args=(settings,))
    run.start()
    while not server.asked:
        going.wait(0.01)
    with pytest.raises(ConfigError, match="another process is at work"):
        regenerate(settings)
    going.set()
    run.join()
    assert len(rows(settings)) == COUNT


def test_a_wrong_key_address_or_model_ends_the_run_at_once(settings, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    for status in (401, 403, 404):
        server.asked = []
        server.respond = lambda body, status=status: error(status, "not you")
        with pytest.raises(ConfigError, match=f"refuses every request: {status} not you"):
            regenerate(settings)
        # What the run before had under way may arrive late.
        assert len(server.asked) < 2 * settings.concurrency < COUNT
    assert server.headers_seen["Authorization"] == "Bearer a key"
    with pytest.raises(ConfigError, match="expected a list of models"):
        regenerate(replace(settings, server=server.url + "/elsewhere"))


def test_a_run_of_which_nothing_works_ends_early(settings, server, tmp_path):
    server.respond = lambda body: error(400, "no images here")
    with pytest.raises(DataError, match=r"no conversation .* 400 no images here"):
        regenerate(settings)
    assert not settings.output.exists()
    many = tmp_path / "many.jsonl"
    row = {"conversations": [{"from": "human", "value": "q"}]}
    many.write_text((json.dumps(row) + "\n") * 500)
    server.asked = []
    with pytest.raises(DataError, match="the first 50 conversations all failed"):
        regenerate(replace(settings, data=many))
    assert len(server.asked) < 60


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ({"server": None}, ConfigError, "both or none of --server and --target"),
        ({"target": "t"}, ConfigError, "both or none of --server and --target"),
        ({"server": "localhost:8000"}, ConfigError, "expected an address such as"),
        ({"samples": 2}, ConfigError, "2 samples at temperature 0"),
        ({"temperature": -1.0}, ConfigError, "temperature of 0 or more"),
        ({"top_p": 0.0}, ConfigError, "top-p above 0"),
        ({"engine_args": "--x"}, ConfigError, "with --target only"),
        ({"image_root": ["nowhere"]}, DataError, "not a folder"),
        ({"output": "nowhere/out.json"}, StorageError, "does not exist"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_asked(
    settings, server, change, kind, reason
):
    with pytest.raises(kind, match=reason):
        regenerate(replace(settings, **change))
    assert not server.asked


def test_an_output_that_is_there_is_kept(settings):
    settings.output.write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        regenerate(settings)
    assert settings.output.read_text() == "mine"
    with pytest.raises(ConfigError, match="file of --data itself"):
        regenerate(replace(settings, output=settings.data, force=True))
    regenerate(replace(settings, force=True))
    assert len(rows(settings)) == COUNT


def test_a_forced_run_goes_on_too(settings, server):
    settings.output.write_text("older")
    server.respond = lambda body: error(500, "") if "what is 9" in str(body) else digest(body)
    forced = replace(settings, force=True, retries=0)
    assert regenerate(forced).unanswered == 1
    server.respond, server.asked = digest, []
    assert regenerate(forced).kept == COUNT - 1 and len(server.asked) == 2


def test_fields_that_are_no_text_stay(settings, tmp_path):
    """Half of a character is no text in UTF-8; JSON holds it escaped."""
    row = {"conversations": [{"from": "human", "value": "é"}], "about": "\ud83d", "n": 1e400}
    path = tmp_path / "odd.json"
    path.write_text(json.dumps([row, {**row, "about": "é"}]))
    regenerate(replace(settings, data=path))
    found = rows(settings)
    assert [r["about"] for r in found] == ["\ud83d", "é"] and found[0]["n"] == float("inf")
    assert '"about": "é"' in settings.output.read_text(encoding="utf-8")


def test_after_its_time_a_run_writes_what_is_there_and_goes_on_later(settings, server, capsys):
    whole = replace(settings, output=settings.output.with_name("whole.json"))
    regenerate(whole)
    server.asked.clear()
    # Two turns of four conversations at a time take 0.2 s or more: twelve do not fit in 0.3 s.
    server.respond = lambda body: time.sleep(0.1) or digest(body)
    command = ["regenerate", "--data", str(settings.data), "--output", str(settings.output),
               "--server", server.url, "--concurrency", "4"]  # fmt: skip
    assert main([*command, "--stop-after-minutes", str(0.3 / 60)]) == 1
    done = len(rows(settings))
    assert 4 <= done < COUNT and rows(settings) == rows(whole)[:done]
    assert f"{COUNT - done} conversations were not asked for" in capsys.readouterr().err
    assert main(command) == 0
    assert rows(settings) == rows(whole) and not journal(settings).exists()
    assert len(server.asked) == 2 * COUNT  # none twice


def test_cut_replies_are_counted(settings, server, capsys):
    server.respond = lambda body: completion("as far as", "length")
    command = ["regenerate", "--data", str(settings.data), "--output", str(settings.output)]
    assert main([*command, "--server", server.url]) == 0
    said = capsys.readouterr()
    assert f"{2 * COUNT} replies were cut at --max-tokens (512)" in said.err
    assert "tokens/s" in said.err
    turns = [turn for row in rows(settings) for turn in row["conversations"]]
    assert all((turn["from"] == "gpt") == turn.get("cut", False) for turn in turns)
