"""Ray, and nothing but Ray: sessions, batches through Ray Data, workers under Ray Train, and their launch."""
