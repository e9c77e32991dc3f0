"""How files are written, and what their headers say."""
