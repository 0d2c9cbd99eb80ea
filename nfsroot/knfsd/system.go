package knfsd

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"krgimage/nfsroot/remote"
)

// Real is this machine.
type Real struct{}

// searchPath is where Debian has the tools; an admin's PATH may lack sbin.
const searchPath = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"

func find(program string) string {
	for dir := range strings.SplitSeq(searchPath, ":") {
		at := dir + "/" + program
		if info, err := os.Stat(at); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return at
		}
	}
	return ""
}

func command(ctx context.Context, argv []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	if at := find(argv[0]); at != "" {
		cmd.Path, cmd.Err = at, nil
	}
	cmd.Env = append(os.Environ(), "PATH="+searchPath, "LC_ALL=C")
	return cmd
}

// Run implements System.
func (Real) Run(ctx context.Context, argv ...string) (string, error) {
	cmd := command(ctx, argv)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// Daemon implements System. The program ends with this process, too.
func (Real) Daemon(argv ...string) (io.Closer, error) {
	cmd := command(context.Background(), argv)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGTERM}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	d := &child{cmd: cmd, done: make(chan struct{})}
	go func() {
		defer close(d.done)
		_ = cmd.Wait()
	}()
	return d, nil
}

type child struct {
	cmd  *exec.Cmd
	done chan struct{}
}

// childGrace is what a daemon has between SIGTERM and SIGKILL.
const childGrace = 5 * time.Second

// Close ends the program.
func (d *child) Close() error {
	_ = d.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-d.done:
	case <-time.After(childGrace):
		_ = d.cmd.Process.Kill()
		<-d.done
	}
	return nil
}

// Find implements System.
func (Real) Find(program string) bool { return find(program) != "" }

// Path implements System.
func (Real) Path(file string) string { return file }

// Served implements System.
func (Real) Served(ctx context.Context, prog, vers uint32) (int, error) {
	return remote.Portmap(ctx, netip.AddrFrom4([4]byte{127, 0, 0, 1}), prog, vers)
}

// startTime bounds the wait for a daemon to register.
const startTime = time.Minute

// Wait implements System. A daemon says nothing when it is ready, so it asks.
func (Real) Wait(ctx context.Context, what string, ready func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for !ready() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s doesn't come up: %w", what, ctx.Err())
		case <-tick.C:
		}
	}
	return nil
}
