"""Paired measurements beside stock PEFT: ``python -m benchmarks`` runs those of a CPU, the other scripts run alone."""
