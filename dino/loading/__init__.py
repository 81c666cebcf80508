"""From a data set to batches of views on the device: order, workers, crops, images that cannot be read."""
