"""What can go wrong, by who can fix it. The command line turns each into an exit code:

0 done and gates passed, 1 internal failure, 2 bad input, 3 a gate failed or its metric is missing, 4 the environment
cannot (no GPU, no memory, no disk, engine absent), 130 interrupted. Anything that is none of these travels as it is.
"""

EXIT_INTERNAL = 1
EXIT_BAD_INPUT = 2
EXIT_GATE_FAILED = 3
EXIT_ENVIRONMENT = 4
EXIT_INTERRUPTED = 130


class InputError(ValueError):
    """The recipe, a model, data or the command line is wrong: says what was given, what is allowed, what to do."""


class EnvironmentCannot(RuntimeError):
    """The input is right, but this machine cannot do it: says what is missing and how to get it."""
