package test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkNFS measures the file server against go-nfs and nfs-ganesha with the
// same client over loopback, and prints a line for each load; see test/nfsload.
// nfs-ganesha is left out where it is not installed.
func BenchmarkNFS(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root: namespaces, and the file server's privileges")
	}
	program := buildLoad(b)
	for range b.N {
		// On the disk of the machine, not in a tmpfs.
		dir, err := os.MkdirTemp("/var/tmp", "nfsload-")
		if err != nil {
			b.Fatal(err)
		}
		defer os.RemoveAll(dir)
		ctx, cancel := context.WithTimeout(b.Context(), 20*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, program, "compare", dir)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Run(); err != nil {
			b.Fatal(err)
		}
	}
}

// buildLoad compiles test/nfsload, statically, for a guest too.
func buildLoad(b *testing.B) string {
	b.Helper()
	program := filepath.Join(b.TempDir(), "nfsload")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", program, "./nfsload")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("build nfsload: %v\n%s", err, out)
	}
	return program
}
