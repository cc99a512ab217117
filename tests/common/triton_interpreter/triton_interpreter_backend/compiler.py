"""The compiler half of the pretended backend; see the package."""

from triton.backends import compiler


def _never(self, *args):
    raise RuntimeError("the interpreter compiles nothing: is TRITON_INTERPRET=1 set?")


InterpreterBackend = type(
    "InterpreterBackend",
    (compiler.BaseBackend,),
    dict.fromkeys(compiler.BaseBackend.__abstractmethods__, _never),
)
