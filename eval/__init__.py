"""Reserved for quality metrics, throughput measurement and reports. Empty in this version."""
