"""What does one client do? Its examples, its local solver, the terms of its objective."""
