// Command nfsload measures NFS version 3 servers against each other: the same
// client, the same files, the same run.
//
//	nfsload compare DIR [LOAD]   this server, go-nfs and nfs-ganesha over the
//	                             loopback of a network namespace of its own
//	nfsload guest                as the init of a virtual machine: this server
//	                             and the kernel's
//	nfsload serve own|go-nfs DIR PORT
//	                             a server alone, for the two above
//
// Every load runs in rounds, each round on every server in turn, and the best
// round counts: on a busy machine it is the one that was disturbed least. LOAD
// picks the loads whose names contain it.
//
// The benchmarks of package test build and run it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "nfsload:", err)
		if os.Getpid() == 1 {
			powerOff(os.Stdout)
		}
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	switch {
	case os.Getpid() == 1:
		return guest(ctx, out)
	case len(args) == 4 && args[0] == "serve":
		return serve(ctx, args[1], args[2], args[3])
	case len(args) >= 2 && args[0] == "compare":
		if os.Getenv(isolated) == "" {
			return isolate(ctx, args)
		}
		return compare(ctx, out, args[1], strings.Join(args[2:], " "))
	}
	return errors.New("usage: nfsload compare DIR [LOAD] | serve own|go-nfs DIR PORT")
}

// compare measures what can be had on this machine.
func compare(ctx context.Context, out io.Writer, dir, only string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := loopback(); err != nil {
		return err
	}
	if err := prepare(dir, fullSizes); err != nil {
		return err
	}
	var targets []*target
	own, err := startOwn(ctx, "own", dir, "22049")
	if err != nil {
		return err
	}
	defer own.stop()
	targets = append(targets, own.target)
	gonfs, err := startOwn(ctx, "go-nfs", dir, "22050")
	if err != nil {
		return err
	}
	defer gonfs.stop()
	targets = append(targets, gonfs.target)
	if why := ganeshaMissing(); why != "" {
		fmt.Fprintln(out, "nfs-ganesha is left out:", why)
	} else {
		ganesha, err := startGanesha(ctx, dir)
		if err != nil {
			return err
		}
		defer ganesha.stop()
		targets = append(targets, ganesha.target)
	}
	return table(ctx, out, dir, targets, fullSizes, 3, only)
}

// result is the best figure of a server for a load.
type result struct {
	best float64
	cpu  float64 // µs of the server's processor time an operation, least of the rounds
	err  error
	slow bool // one round has taken long enough
}

// table runs the loads and prints a line for each: the figures of all servers,
// how many times faster the first is than each of the others, and the processor
// time that each took for an operation, which is what to compare on a machine
// that has other things to do (0 for the kernel's, which has none of its own).
func table(ctx context.Context, out io.Writer, dir string, targets []*target, n sizes, rounds int, only string) error {
	for _, t := range targets {
		if t.root != nil {
			continue
		}
		var err error
		if t.root, err = mount(t.mount, t.path); err != nil {
			return fmt.Errorf("mount %s: %w", t.name, err)
		}
	}
	fmt.Fprintf(out, "%-36s", "")
	for _, t := range targets {
		fmt.Fprintf(out, " %12s", t.name+" /s")
	}
	for _, t := range targets[1:] {
		fmt.Fprintf(out, " %14s", "own/"+t.name)
	}
	for _, t := range targets {
		fmt.Fprintf(out, " %12s", t.name+" µs")
	}
	fmt.Fprintln(out)
	for _, l := range loads() {
		if !strings.Contains(l.name, only) {
			continue
		}
		results := make([]result, len(targets))
		for range rounds {
			for i, t := range targets {
				if results[i].err != nil || results[i].slow {
					continue
				}
				start := time.Now()
				rate, cpu, err := measure(ctx, dir, t, l, n)
				results[i].err = err
				results[i].slow = time.Since(start) > 6*n.slice
				results[i].best = max(results[i].best, rate)
				if cpu > 0 && (results[i].cpu == 0 || cpu < results[i].cpu) {
					results[i].cpu = cpu
				}
			}
		}
		fmt.Fprintf(out, "%-36s", l.name)
		for _, r := range results {
			if r.err != nil {
				fmt.Fprintf(out, " %12s", "failed")
			} else {
				fmt.Fprintf(out, " %12.0f", r.best)
			}
		}
		for _, r := range results[1:] {
			if r.err != nil || results[0].err != nil {
				fmt.Fprintf(out, " %14s", "-")
			} else {
				fmt.Fprintf(out, " %14.2f", results[0].best/r.best)
			}
		}
		for _, r := range results {
			fmt.Fprintf(out, " %12.1f", r.cpu)
		}
		fmt.Fprintln(out, " ", l.unit)
		for i, r := range results {
			if r.err != nil {
				fmt.Fprintf(out, "    %s: %v\n", targets[i].name, r.err)
			}
		}
	}
	return nil
}

// measure runs a load once.
func measure(ctx context.Context, dir string, t *target, l load, n sizes) (rate, cpu float64, err error) {
	if err := ctx.Err(); err != nil {
		return 0, 0, err
	}
	b := &bench{n: n, t: t, root: t.root}
	for range l.conns {
		c, err := dial(t.nfs, progNFS)
		if err != nil {
			return 0, 0, err
		}
		defer c.nc.Close()
		b.clients = append(b.clients, c)
	}
	t.round++
	work := fmt.Sprintf("work-%s-%d", t.name, t.round)
	if b.work, err = b.clients[0].mkdir(b.root, work); err != nil {
		return 0, 0, err
	}
	defer os.RemoveAll(filepath.Join(dir, work))
	before := cpuTime(t.pid)
	if err := l.run(b); err != nil {
		return 0, 0, err
	}
	took := time.Since(b.begin)
	done := float64(b.done.Load())
	cpu = float64((cpuTime(t.pid) - before).Microseconds()) / max(done, 1)
	if l.unit == "MB" {
		done *= float64(n.io) / (1 << 20)
	}
	return done / took.Seconds(), cpu, nil
}

// cpuTime is the processor time that a process has used, from its utime and
// stime in ticks of 10 ms (proc_pid_stat(5)).
func cpuTime(pid int) time.Duration {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if pid == 0 || err != nil {
		return 0
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(fields) < 13 {
		return 0
	}
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}
