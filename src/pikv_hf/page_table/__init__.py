"""page_table."""
