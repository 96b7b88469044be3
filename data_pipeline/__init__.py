"""From captioned videos to a training set of multi-subject pairs; and the procedural world."""
