"""Reserved for uncertainty estimation modules, which decide per sample where to stop. Empty in this version."""
