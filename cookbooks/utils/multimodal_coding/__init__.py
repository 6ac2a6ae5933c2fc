"""Code that a model wrote, made visible without trusting it.

code_of         an answer -> the code in it
screenshot_of   HTML, SVG -> a picture, by a browser without network
run_program     Python -> the files it wrote, in a process without network, files or time to waste
"""

from .locked_down import Outcome, run_program
from .screenshot import code_of, screenshot_of

__all__ = ["Outcome", "code_of", "run_program", "screenshot_of"]
