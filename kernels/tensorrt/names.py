"""The plugin's name, version and namespace, the same for all three kinds."""

NAME, VERSION, NAMESPACE = "VstarTemporalAttention", "1", "vstar"
