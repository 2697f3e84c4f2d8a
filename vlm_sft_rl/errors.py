"""The one exception type that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can cure: the message names the file, the row, the field, what was expected, and the cure.

    The console command prints the message alone (no traceback) and exits with status 2.
    """
