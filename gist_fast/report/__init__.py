"""Reports: one self-contained HTML page of tables and pictures, and the house's plots for it."""
