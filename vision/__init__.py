"""Vision domain of adaptsuite."""
