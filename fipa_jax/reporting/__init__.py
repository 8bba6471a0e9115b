"""What does a person see of a run?

Its figures (`metrics`), lines and tables (`console`), pictures (`curves`, `plots`), and a page on all of it (`report`).
"""
