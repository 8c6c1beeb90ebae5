"""Gates of an injected model: record, measure, fold, merge, plot."""
