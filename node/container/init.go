package container

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"krgimage/node/retry"
	"krgimage/node/supervise"
)

// defaultGrace is the time between SIGTERM and SIGKILL for the container's
// processes when it stops.
const defaultGrace = 5 * time.Second

// StopTime is how long a container with the default grace may take to stop.
const StopTime = 3 * defaultGrace

// Main is the container's init. It returns its exit status: the kernel then
// kills whatever is still in the container.
func Main(out io.Writer) int {
	// Go's default for most signals is to exit, which an init must not.
	signal.Notify(make(chan os.Signal, 1))
	log := slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{} // the host's log has its own
		}
		return a
	}})).With("component", Name)
	c, err := readConfig()
	if err == nil {
		err = prepare(c)
	}
	if err == nil {
		err = mountShares(c, log)
	}
	if err != nil {
		log.Error("the container doesn't start", "err", err)
		return 1
	}
	if c.Grace == 0 {
		c.Grace = defaultGrace
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT, unix.SIGPWR)
	defer stop()
	if err := serve(ctx, c, log, out); err != nil {
		log.Error("the container stops", "err", err)
		return 1
	}
	return 0
}

// prepare makes this process a fresh init: nothing of the host's is left.
func prepare(c Config) error {
	// Whatever was inherited by mistake must not reach the container's programs.
	if err := unix.CloseRange(configFD, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close inherited files: %w", err)
	}
	if err := defaultSignals(); err != nil {
		return err
	}
	unix.Umask(0)
	if err := enter(c); err != nil {
		return err
	}
	unix.Umask(0o022)
	if err := unix.Sethostname([]byte(c.Hostname)); err != nil {
		return fmt.Errorf("set host name %q: %w", c.Hostname, err)
	}
	if c.Domain != "" {
		if err := unix.Setdomainname([]byte(c.Domain)); err != nil {
			return fmt.Errorf("set domain name %q: %w", c.Domain, err)
		}
	}
	// Kernels from 6.14 on have one limit for each PID namespace.
	_ = os.WriteFile("/proc/sys/kernel/pid_max", []byte("4194304\n"), 0)
	// The kernel's limit for an init, 4096 files, is too low for servers. The
	// soft limit stays, since programs with select(2) rely on it.
	_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1024, Max: 524288})
	// Losing this process loses the whole container.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-900\n"), 0)
	return nil
}

// defaultSignals gives the two signals that Go's runtime leaves as they were
// inherited (32 and 33, libc's own; posix_spawn ignores them) their default
// action. The others are caught since Main began, and exec resets what is
// caught.
func defaultSignals() error {
	var action struct {
		handler, flags, restorer uintptr
		mask                     uint64
	} // the kernel's struct sigaction; zero is SIG_DFL
	for _, signal := range []uintptr{32, 33} {
		if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, signal, uintptr(unsafe.Pointer(&action)), 0, unsafe.Sizeof(action.mask), 0, 0); errno != 0 {
			return fmt.Errorf("default action of signal %d: %w", signal, errno)
		}
	}
	return nil
}

// serve runs the services until ctx ends, then ends every process of the
// container.
func serve(ctx context.Context, c Config, log *slog.Logger, out io.Writer) error {
	reaper := supervise.NewReaper(true)
	reapCtx, stopReaping := context.WithCancel(context.Background())
	defer stopReaping()
	var reaping errgroup.Group
	reaping.Go(func() error { return reaper.ReapAll(reapCtx) })

	var units errgroup.Group
	var mu sync.Mutex // services write line by line to one stream
	for _, s := range c.Services {
		u := supervise.New(supervise.Service{
			Name: s.Name,
			Command: func() (*exec.Cmd, error) {
				cmd := exec.Command(s.Argv[0], s.Argv[1:]...)
				cmd.Env, cmd.Dir = environment, "/"
				return cmd, nil
			},
			StopTimeout: c.Grace,
			Tee:         &prefixed{mu: &mu, w: out, prefix: s.Name + ": "},
			OnStart: func(pid int) {
				_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("0\n"), 0)
			},
		}, reaper, retry.System{}, log)
		units.Go(func() error { return u.Run(ctx) })
	}
	<-ctx.Done()
	log.Info("the container stops")
	err := units.Wait()
	stopReaping()
	_ = reaping.Wait()
	killAll(c.Grace)
	return err
}

// killAll ends all processes that this one, an init, sees. Orphans become its
// children, so having no child left means that all are gone.
func killAll(grace time.Duration) {
	gone := make(chan struct{})
	go func() { // ends with the last process, or with this one
		defer close(gone)
		for {
			if _, err := unix.Wait4(-1, nil, 0, nil); errors.Is(err, unix.ECHILD) {
				return
			}
		}
	}()
	for _, step := range []struct {
		signal  unix.Signal
		timeout time.Duration
	}{{unix.SIGTERM, grace}, {unix.SIGKILL, grace / 2}} {
		_ = unix.Kill(-1, step.signal)
		_ = unix.Kill(-1, unix.SIGCONT)
		select {
		case <-gone:
			return
		case <-time.After(step.timeout):
		}
	}
}

// prefixed writes whole lines with a prefix.
type prefixed struct {
	mu     *sync.Mutex
	w      io.Writer
	prefix string
	rest   string // an unfinished line
}

func (p *prefixed) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rest += string(b)
	for {
		line, rest, ok := strings.Cut(p.rest, "\n")
		if !ok {
			break
		}
		p.rest = rest
		if _, err := io.WriteString(p.w, p.prefix+line+"\n"); err != nil {
			return 0, err
		}
	}
	if len(p.rest) > 64<<10 {
		p.rest = ""
	}
	return len(b), nil
}
