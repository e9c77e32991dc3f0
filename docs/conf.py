"""Sphinx builds the site from the Markdown here: `make docs`. Nothing is taken from the network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

project = "grokquant"
copyright = "the grokquant authors, Apache-2.0"
extensions = ["myst_parser", "generated"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
smartquotes = False  # would make one dash of --set
highlight_language = "text"

html_theme = "furo"
html_title = "grokquant"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
