"""What several test modules share: oracles, clients, archives, whole runs that take a second."""
