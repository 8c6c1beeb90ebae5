"""The demo: a task whose words do not give the label away, and three ways to learn it. Its sentences lie beside."""
