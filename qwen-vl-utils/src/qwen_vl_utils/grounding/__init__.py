"""What Qwen vision-language models say about places: read, converted and drawn.

answer --parse_*--> Parsed[Box | Point | Box3D | Span | Element | ToolCall]
Box, Point     --to_original / to_pixels / rescale--> pixels of the picture at hand --draw_places--> picture
training row   --to_resized--> pixels of the picture that the model sees

Sizes are height and width, in this order or by name; coordinates are x and y, in this order. Relative
coordinates are divided by 1000, everywhere. Importing this needs neither torch nor numpy nor Pillow.
"""

from .convert import (
    COORDINATES,
    RELATIVE,
    Coordinates,
    clipped,
    coordinates_of,
    from_resized,
    rescale,
    resized_size,
    rounded,
    to_original,
    to_pixels,
    to_relative,
    to_resized,
)
from .draw import Camera, corners, draw_places, draw_spans, projected_edges
from .parse import (
    parse_boxes,
    parse_boxes_3d,
    parse_html,
    parse_markdown,
    parse_places,
    parse_points,
    parse_spans,
    parse_tool_calls,
)
from .places import Box, Box3D, Element, Parsed, Point, Span, ToolCall

__all__ = [
    "COORDINATES",
    "RELATIVE",
    "Box",
    "Box3D",
    "Camera",
    "Coordinates",
    "Element",
    "Parsed",
    "Point",
    "Span",
    "ToolCall",
    "clipped",
    "coordinates_of",
    "corners",
    "draw_places",
    "draw_spans",
    "from_resized",
    "parse_boxes",
    "parse_boxes_3d",
    "parse_html",
    "parse_markdown",
    "parse_places",
    "parse_points",
    "parse_spans",
    "parse_tool_calls",
    "projected_edges",
    "rescale",
    "resized_size",
    "rounded",
    "to_original",
    "to_pixels",
    "to_relative",
    "to_resized",
]
