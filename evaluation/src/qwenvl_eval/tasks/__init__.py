"""The tasks that come along, one file each; see :mod:`qwenvl_eval.task`."""
