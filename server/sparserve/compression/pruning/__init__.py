"""Which attention heads and feed-forward neurons to remove, and what the rest can make up for: functions of one
layer's weights and of what its units did on a calibration text."""
