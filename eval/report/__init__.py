"""Reports from result folders: figures, an HTML page, Markdown tables and paired comparisons."""
