"""Each operation's definition in plain torch: the truth that every kernel is tested against, and the last fallback."""
