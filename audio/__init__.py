"""Audio domain of adaptsuite."""
