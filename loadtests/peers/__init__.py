"""The same closed-loop workload and the same correctness check on our server and on its peers."""
