"""MathVision: ``run_mathv.py infer|eval --help``."""

import sys

from qwenvl_eval.scripts import main

if __name__ == "__main__":  # worker processes import this file
    sys.exit(main("mathvision"))
