package uml

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"krgimage/node/nfsclient"
)

// bootLimit is how long a guest may take from start to its first job. It takes
// two seconds on a quiet machine.
const bootLimit = 5 * time.Minute

// agentPort is where a guest's init takes jobs.
const agentPort = 1

// Guest is a running kernel with an init that takes jobs.
type Guest struct {
	Name    string
	Addr    netip.Addr
	net     *Net
	tap     string
	cmd     *exec.Cmd
	ended   chan struct{} // closed when the kernel's process has ended
	console *console
}

// Boot starts a kernel. It ends with the test.
func (n *Net) Boot(t testing.TB, name string) *Guest {
	t.Helper()
	return n.BootAll(t, name)[0]
}

// BootAll boots several at a time.
func (n *Net) BootAll(t testing.TB, names ...string) []*Guest {
	t.Helper()
	var guests []*Guest
	for _, name := range names {
		tap, addr, err := n.plug()
		if err != nil {
			t.Fatalf("User-Mode Linux %s: %v", name, err)
		}
		g := &Guest{Name: name, Addr: addr, net: n, tap: tap}
		if err := g.start(t); err != nil {
			t.Fatalf("User-Mode Linux %s: %v", name, err)
		}
		guests = append(guests, g)
	}
	awaitAll(t, guests)
	return guests
}

// BootAgain boots a guest that was killed, with its name and address.
func (g *Guest) BootAgain(t testing.TB) {
	t.Helper()
	if err := g.start(t); err != nil {
		t.Fatalf("User-Mode Linux %s: %v", g.Name, err)
	}
	awaitAll(t, []*Guest{g})
}

func awaitAll(t testing.TB, guests []*Guest) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	for _, g := range guests {
		if err := g.wait(ctx); err != nil {
			t.Fatalf("User-Mode Linux %s: %v\nconsole:\n%s", g.Name, err, g.console)
		}
	}
}

func (g *Guest) start(t testing.TB) error {
	linux, err := kernel()
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir := t.TempDir()
	ended := make(chan struct{})
	g.ended, g.console = ended, &console{}
	g.cmd = exec.Command(linux,
		"mem=768M", "rootfstype=hostfs", "rootflags=/", "ro", "quiet", "panic=-1",
		"uml_dir="+dir, "umid="+g.Name, "con=null", "con0=null,fd:1", "ssl=null",
		// gro=1: without it large incoming segments are dropped.
		"vec0:transport=tap,ifname="+g.tap+",gro=1",
		initVariable+"="+g.Addr.String(), "KRG_UML_NAME="+g.Name, "KRG_UML_HEAD="+g.net.Addr.String(),
		"init="+self)
	// The guest's memory is a sparse file, best in memory itself.
	g.cmd.Env = append(os.Environ(), "TMPDIR=/dev/shm")
	g.cmd.Stdout, g.cmd.Stderr = g.console, g.console
	// A group of its own: the kernel's processes end with it.
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := g.net.Do(g.cmd.Start); err != nil {
		return err
	}
	cmd, console := g.cmd, g.console
	go func() {
		cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-ended
		if t.Failed() && console.len() > 0 {
			t.Logf("console of %s:\n%s", g.Name, console)
		}
	})
	return nil
}

// Kill ends the guest at once, as a loss of power does.
func (g *Guest) Kill() {
	_ = syscall.Kill(-g.cmd.Process.Pid, syscall.SIGKILL)
	<-g.ended
}

func (g *Guest) wait(ctx context.Context) error {
	for {
		err := g.reach(ctx)
		if err == nil {
			err = g.run(ctx, Job{Args: []string{"/bin/true"}}, io.Discard)
		}
		if err == nil {
			return nil
		}
		select {
		case <-g.ended:
			return fmt.Errorf("the kernel ended: %s", g.cmd.ProcessState)
		case <-ctx.Done():
			return fmt.Errorf("no answer in %s: %w", bootLimit, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// reach looks whether the guest's init listens. A guest that boots again has
// another Ethernet address, so the first packets to it may go nowhere.
func (g *Guest) reach(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c, err := g.net.Dial(ctx, netip.AddrPortFrom(g.Addr, agentPort))
	if err != nil {
		return err
	}
	return c.Close()
}

// Job is a process in a guest.
type Job struct {
	Args   []string // program and arguments
	Dir    string   // "/" by default
	Env    []string // besides PATH and HOME
	Root   string   // change root there first
	UID    uint32
	GID    uint32
	Groups []uint32
	Stdin  string
}

// Call is a job that runs a Program of the test binary.
func Call(program string, args ...string) Job {
	return Job{Args: append([]string{rolePrograms + program}, args...)}
}

// ExitError says that a job ended otherwise than with status 0.
type ExitError struct {
	Status string
	Code   int // -1 after a signal
}

func (e *ExitError) Error() string { return e.Status }

// Run runs a job and returns what it printed, both outputs together.
func (g *Guest) Run(ctx context.Context, job Job) (string, error) {
	var out bytes.Buffer
	err := g.run(ctx, job, &out)
	if err != nil {
		err = fmt.Errorf("%s: %s: %w", g.Name, strings.Join(job.Args, " "), err)
	}
	return out.String(), err
}

// Stream is Run with the output written as it comes.
func (g *Guest) Stream(ctx context.Context, job Job, out io.Writer) error {
	return g.run(ctx, job, out)
}

// Must is Run for jobs that have to succeed.
func (g *Guest) Must(t testing.TB, job Job) string {
	t.Helper()
	out, err := g.Run(t.Context(), job)
	if err != nil {
		t.Fatalf("%v\n%s", err, tail(out, 8<<10))
	}
	return out
}

// Shell is Must with a script for /bin/sh that stops at the first error.
func (g *Guest) Shell(t testing.TB, script string) string {
	t.Helper()
	return g.Must(t, Shell(script))
}

// Shell is a job that runs a script, to the first error.
func Shell(script string) Job { return Job{Args: []string{"/bin/sh", "-euc", script}} }

// Mount mounts an export of the machine's NFS server at dir of the guest, with
// the options of a node's root; more of them come last and win.
func (g *Guest) Mount(t testing.TB, port int, path, dir string, options ...string) {
	t.Helper()
	src := nfsclient.Mount{Server: g.net.Addr, Path: path, Port: port, MountPort: port, Options: options}
	g.Must(t, Job{Args: []string{jobMount, src.String(), dir, src.Data()}})
}

// MountLocked is Mount with locks that hold between the guests, as a node's
// container has its root. The server must have been started by StartServer.
func (g *Guest) MountLocked(t testing.TB, port int, path, dir string, options ...string) {
	t.Helper()
	src := nfsclient.Mount{Server: g.net.Addr, Path: path, Port: port, MountPort: port, Options: options, Locks: true}
	g.Must(t, Job{Args: []string{jobLocks}})
	g.Must(t, Job{Args: []string{jobMount, src.String(), dir, src.Data()}})
}

// Unmount takes a mount away, and with it all that the guest has cached of it.
func (g *Guest) Unmount(t testing.TB, dir string) {
	t.Helper()
	g.Must(t, Job{Args: []string{jobUnmount, dir}})
}

// answer is a piece of what a guest sends about a job.
type answer struct {
	Output []byte     `json:"output,omitempty"`
	Error  string     `json:"error,omitempty"` // the job couldn't be started
	Exit   *ExitError `json:"exit,omitempty"`  // the last piece
}

func (g *Guest) run(ctx context.Context, job Job, out io.Writer) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-g.ended:
			cancel(errors.New("the guest is dead"))
		case <-ctx.Done():
		}
	}()
	c, err := g.net.Dial(ctx, netip.AddrPortFrom(g.Addr, agentPort))
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if err := json.NewEncoder(c).Encode(job); err != nil {
		return err
	}
	dec := json.NewDecoder(c)
	for {
		var a answer
		if err := dec.Decode(&a); err != nil {
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			return fmt.Errorf("connection to the guest: %w", err)
		}
		switch {
		case a.Error != "":
			return errors.New(a.Error)
		case a.Exit != nil && a.Exit.Code == 0:
			return nil
		case a.Exit != nil:
			return a.Exit
		}
		if _, err := out.Write(a.Output); err != nil {
			return err
		}
	}
}

func tail(s string, n int) string {
	if len(s) > n {
		return "...\n" + s[len(s)-n:]
	}
	return s
}

// console keeps what a guest's kernel prints.
type console struct {
	mu  sync.Mutex
	buf []byte
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buf = append(c.buf, p...)
	if len(c.buf) > 64<<10 {
		c.buf = c.buf[len(c.buf)-32<<10:]
	}
	return len(p), nil
}

func (c *console) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.buf)
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.buf)
}
