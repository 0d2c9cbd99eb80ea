package trial

import (
	"bytes"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
)

// child is a running program that can't outlive this process.
type child struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // of Wait; valid once done is closed
}

// startChild starts cmd such that the kernel kills it when this process dies,
// however it dies. That signal comes when the *thread* that forked ends
// (PR_SET_PDEATHSIG(2)), so one goroutine keeps its thread for the child's life.
func startChild(cmd *exec.Cmd) (*child, error) {
	c := &child{cmd: cmd, done: make(chan struct{})}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	// Its own process group: a Ctrl-C at the terminal is for us to handle.
	cmd.SysProcAttr.Setpgid = true
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		c.err = cmd.Wait()
		close(c.done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return c, nil
}

func (c *child) kill() { c.cmd.Process.Kill() }

func (c *child) pid() int { return c.cmd.Process.Pid }

// tail keeps the last kilobytes written to it: what a QEMU said on stderr.
type tail struct {
	mu  sync.Mutex
	buf []byte // guarded by mu
}

func (t *tail) Write(p []byte) (int, error) {
	const keep = 4 << 10
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if n := len(t.buf) - keep; n > 0 {
		t.buf = t.buf[n:]
	}
	return len(p), nil
}

// hint is the text as the end of an error message: without warnings, which are
// rarely the reason, and on one line.
func (t *tail) hint() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var lines []string
	for line := range bytes.Lines(t.buf) {
		s := strings.TrimSpace(string(line))
		if s == "" || strings.Contains(s, ": warning: ") {
			continue
		}
		lines = append(lines, strings.TrimPrefix(s, "qemu-system-x86_64: "))
	}
	if len(lines) == 0 {
		return ""
	}
	return ": " + strings.Join(lines, "; ")
}

// last is the end of the text, at most n bytes.
func (t *tail) last(n int) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf[max(0, len(t.buf)-n):])
}
