"""The driver half of the pretended backend; see the package."""

from triton.backends import driver


def _never(self, *args):
    raise RuntimeError("the interpreter needs no driver: is TRITON_INTERPRET=1 set?")


InterpreterDriver = type(
    "InterpreterDriver",
    (driver.DriverBase,),
    dict.fromkeys(driver.DriverBase.__abstractmethods__, _never)
    | {"is_active": staticmethod(lambda: True)},
)
