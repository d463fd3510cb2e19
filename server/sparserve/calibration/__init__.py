"""`sparserve calibrate`: what choices of neurons cost on a given text, measured with what serves."""
