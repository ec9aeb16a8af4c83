"""The one exception for what a person gave and can put right."""


class InputError(ValueError):
    """Bad input: one sentence that names the thing, its value and what would be right.

    The command line prints it and exits with code 2. `InputError.__str__` is that sentence.
    """
