"""The pages of reports: self-contained HTML."""
