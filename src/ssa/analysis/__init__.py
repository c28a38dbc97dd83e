"""What attention does: kept mass, entropy, Theorem 1, divergence of the two modes, pictures, and a report."""
