package trial

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestMeasureBareBoot has a script play QEMU; with the path of a kernel in
// KRGIMAGE_TEST_KERNEL the real one boots it up to its first message.
func TestMeasureBareBoot(t *testing.T) {
	tests := []struct {
		name, script, err string
	}{
		{"marker", "printf 'Linux version'; printf ' 6\\nbare in'; printf 'it runs\\n'; exec sleep 1000", ""},
		{"marker as the last word", "echo bare init runs", ""},
		{"ends too early", "echo panic; echo 'no kernel there' >&2; exit 3", "QEMU ended with status 3 before \"bare init runs\" was printed: no kernel there"},
		{"never", "echo 'Kernel panic'; exec sleep 1000", "was not printed: context canceled; the console ended with: Kernel panic"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			qemu := filepath.Join(t.TempDir(), "qemu")
			if err := os.WriteFile(qemu, []byte("#!/bin/sh\n"+tt.script+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			out := writerFunc(func(p []byte) (int, error) {
				if strings.Contains(string(p), "panic\n") && tt.name == "never" {
					cancel()
				}
				return len(p), nil
			})
			took, err := BareBoot{QEMU: qemu, Kernel: "vmlinuz", Marker: "bare init runs", CPUs: 1, Memory: 128 << 20}.measure(ctx, out)
			if tt.err == "" && (err != nil || took <= 0) || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("%s, %v; want error %q", took, err, tt.err)
			}
		})
	}
	_, err := MeasureBareBoot(t.Context(), BareBoot{QEMU: "/nonexistent/qemu", Kernel: "vmlinuz"})
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "bare boot of vmlinuz") {
		t.Errorf("without QEMU: %v", err)
	}
}

func TestMeasureBareBootKernel(t *testing.T) {
	kernel := os.Getenv("KRGIMAGE_TEST_KERNEL")
	if kernel == "" {
		t.Skip("KRGIMAGE_TEST_KERNEL names no kernel")
	}
	in := install(t, false)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	initrd := filepath.Join(t.TempDir(), "initrd")
	if err := os.WriteFile(initrd, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	// Without an init the kernel ends in this panic: it got through.
	took, err := MeasureBareBoot(ctx, BareBoot{
		QEMU: in.QEMU, Accel: tcg, Kernel: kernel, Initrd: initrd, Memory: 256 << 20, CPUs: 1, Marker: "Unable to mount root fs",
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(took)
}
