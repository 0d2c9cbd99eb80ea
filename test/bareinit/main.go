// Command bareinit is the smallest init there is: it says on the console that
// it runs. Benchmarks boot it with the cluster's kernel to know how much of a
// node's boot is the kernel's own.
package main

import (
	"fmt"
	"os"
)

// Marker is what appears on the console.
const Marker = "bare init runs"

func main() {
	console, err := os.OpenFile("/dev/console", os.O_WRONLY, 0)
	if err != nil {
		console = os.Stdout
	}
	fmt.Fprintln(console, Marker)
	select {} // an init that returns is a kernel panic
}
