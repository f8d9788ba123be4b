"""Read the charts of a page."""

import html
import json
import re


def drawn_charts(page: str) -> list[dict]:
    """Return the data of the charts in HTML, in their order."""
    return [json.loads(html.unescape(data)) for data in re.findall(r'data-chart="([^"]*)"', page)]
