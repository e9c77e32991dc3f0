"""What people see of runs and evaluations: tables, pages, the terminal."""
