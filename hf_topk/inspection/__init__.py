"""Shows a converted model to people: tables on a terminal, and a report as one page."""
