package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"krgimage/initramfs"
	"krgimage/node/trial"
)

// BenchmarkBuild times builds and says the size of every artefact: "cold" with
// no package downloaded yet, "packages-cached" after that, "unchanged", and
// "config-only" where the cluster got another name. The ratio is to the cold
// build.
func BenchmarkBuild(b *testing.B) {
	s := newSite(b)
	s.run(time.Minute, "init")
	timed := func(args ...string) time.Duration {
		start := time.Now()
		s.run(20*time.Minute, append([]string{"build", "--cache", s.path("cache")}, args...)...)
		return time.Since(start)
	}
	for range b.N {
		cold := timed()
		report := func(name string, took time.Duration) {
			say("build %-16s %6.1f s  ratio %.3f", name, took.Seconds(), took.Seconds()/cold.Seconds())
			b.ReportMetric(took.Seconds(), name+"-s")
		}
		report("cold", cold)
		report("packages-cached", timed("--rebuild", "all"))
		report("unchanged", timed())
		s.edit("\nname: krg\n", "\nname: bench\n")
		report("config-only", timed())
	}
	var manifest struct {
		Artefacts []struct {
			Path string
			Size int64
		}
	}
	data, err := os.ReadFile(s.path("state/image/current/manifest.json"))
	if err != nil {
		b.Fatal(err)
	}
	if err := json.Unmarshal(data, &manifest); err != nil {
		b.Fatal(err)
	}
	for _, a := range manifest.Artefacts {
		say("size of %-18s %8.2f MB", a.Path, float64(a.Size)/1e6)
	}
}

// BenchmarkBoot times 1, 2 and 3 machines at once from QEMU's start until sshd
// answers, by stage, beside the time that the same kernel in the same QEMU needs
// to reach an init that does nothing. The ratio is to that.
func BenchmarkBoot(b *testing.B) {
	s := newSite(b)
	s.run(time.Minute, "init")
	s.run(20*time.Minute, "build")
	for range b.N {
		bare := s.bareBoot(b)
		say("bare init: %.1f s", bare.Seconds())
		b.ReportMetric(bare.Seconds(), "bare-s")
		for nodes := 1; nodes <= 3; nodes++ {
			s.run(bootLimit, "trial", "--keep", "--nodes", fmt.Sprint(nodes))
			var report trial.Report
			s.decode(&report, "trial", "status", "--json")
			slowest := 0.0
			for _, n := range report.Nodes {
				slowest = max(slowest, n.Seconds)
				var stages []string
				for _, st := range n.Stages {
					stages = append(stages, fmt.Sprintf("%s %.1f", st.Stage, st.Seconds))
				}
				say("%d at once, node %d: %s", nodes, n.ID, strings.Join(stages, ", "))
			}
			say("%d at once: all ready after %.1f s, ratio to the bare init %.2f", nodes, slowest, slowest/bare.Seconds())
			b.ReportMetric(slowest, fmt.Sprintf("%d-nodes-s", nodes))
			b.ReportMetric(slowest/bare.Seconds(), fmt.Sprintf("%d-nodes/bare", nodes))
			s.run(2*time.Minute, "trial", "stop")
		}
	}
}

// say prints a line of the result; a benchmark's log would be cut after ten.
func say(format string, args ...any) { fmt.Printf("  "+format+"\n", args...) }

// bareBoot boots the image's kernel with test/bareinit.
func (s *site) bareBoot(b *testing.B) time.Duration {
	b.Helper()
	program, archive := s.path("bareinit"), s.path("bareinit.img")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", program, "./bareinit")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("build the bare init: %v\n%s", err, out)
	}
	data, err := os.ReadFile(program)
	if err != nil {
		b.Fatal(err)
	}
	f, err := os.Create(archive)
	if err != nil {
		b.Fatal(err)
	}
	if err := errors.Join(initramfs.Init(f, data), f.Close()); err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(b.Context(), bootLimit)
	defer cancel()
	install, err := trial.Find(false)
	if err != nil {
		b.Fatal(err)
	}
	accel, err := trial.Probe(ctx, install.QEMU)
	if err != nil {
		b.Fatal(err)
	}
	took, err := trial.MeasureBareBoot(ctx, trial.BareBoot{
		QEMU: install.QEMU, Accel: accel, Memory: 512 << 20, CPUs: 1, Append: "quiet", Marker: "bare init runs",
		Kernel: filepath.Join(s.dir, "state/image/current/vmlinuz"), Initrd: archive,
	})
	if err != nil {
		b.Fatal(err)
	}
	return took
}
