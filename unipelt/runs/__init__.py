"""One run of any task: settings, training, folder, errors, cache, batches."""
