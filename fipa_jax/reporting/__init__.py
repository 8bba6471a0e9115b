"""What does a person see of a run? Its figures (`metrics`), its lines and tables (`console`), its pictures (`plots`)."""
