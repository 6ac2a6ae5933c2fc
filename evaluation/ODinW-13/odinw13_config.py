"""Where the 13 sets lie in the data folder: the table of qwenvl_eval under the names of old."""

from qwenvl_eval.tasks.odinw import SETS

dataset_prefixes = [one.name for one in SETS]
datasets = [{"name": one.name, "ann_file": one.ann_file, "img_prefix": one.img_prefix} for one in SETS]
