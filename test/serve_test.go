package test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestServeOnARealLink runs the head node on a kernel interface, as on metal:
// a tap device in a network namespace, with a UEFI machine on its other end
// whose own firmware does DHCP and TFTP. In the middle, the head node dies and
// comes back.
func TestServeOnARealLink(t *testing.T) {
	s := newSite(t)
	s.run(time.Minute, "init")
	s.run(20*time.Minute, "build")
	s.fails("no network interface", "serve", "--interface", "nosuch0")

	ns := newNamespace(t)
	ns.run("ip", "tuntap", "add", "dev", "boot0", "mode", "tap")
	ns.run("ip", "link", "set", "boot0", "up")
	s.fails("ip addr add", ns.args(s.bin, "serve", "--interface", "boot0")...)
	ns.run("ip", "addr", "add", "10.77.0.254/24", "dev", "boot0")

	head := s.serve(ns)
	node := startUEFI(t, s, ns, "52:54:00:77:00:01")
	waitForReady := func() {
		waitFor(t, bootLimit, "the node is ready", func() bool {
			if !node.alive() {
				t.Fatalf("QEMU ended:\n%s", node.stderr.String())
			}
			_, ready := s.bootOf(1)
			return ready
		})
	}
	waitForReady()
	ssh := func(command string) (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		args := ns.args(s.bin, "ssh", "1", "--", command)
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Dir = s.dir
		out, err := cmd.CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
	if out, err := ssh("hostname; echo before > survives"); err != nil || out != "krg-1" {
		t.Fatalf("ssh to the real address: %q, %v", out, err)
	}

	// A second head on the same state or the same port says so.
	s.fails("another krgimage is at work", ns.args(s.bin, "serve", "--interface", "boot0")...)

	// The head is killed and started again: the node works on, and its id stays.
	started, _ := s.bootOf(1)
	head.kill()
	head = s.serve(ns)
	if out, err := ssh("cat survives; krg node | grep node_id"); err != nil || out != "before\nnode_id: 1" {
		t.Errorf("after the head's restart: %q, %v", out, err)
	}
	if again, _ := s.bootOf(1); !again.Equal(started) {
		t.Errorf("the node booted again at %v, or its timeline was lost", again)
	}

	// The machine is reset, and the head dies when the machine has its kernel:
	// no address, no root. It says so on its console, and waits.
	node.reset(t)
	waitFor(t, bootLimit, "the node loads its initramfs again", func() bool { return s.reached(1, "initramfs", started) })
	head.kill()
	waitFor(t, bootLimit, "the node says that it tries again", func() bool {
		console, err := os.ReadFile(s.path("uefi.log"))
		return err == nil && bytes.Contains(console, []byte("again_in="))
	})
	head = s.serve(ns)
	waitFor(t, bootLimit, "the node boots on", func() bool { return s.reached(1, "ready", started) })
	if out, err := ssh("cat survives"); err != nil || out != "before" {
		t.Errorf("after the reset: %q, %v", out, err)
	}
	head.stop()
}

// namespace is a network namespace of this test run.
type namespace struct {
	t    *testing.T
	name string
}

func newNamespace(t *testing.T) *namespace {
	t.Helper()
	ns := &namespace{t, fmt.Sprintf("krgtest%d", os.Getpid())}
	if out, err := exec.Command("ip", "netns", "add", ns.name).CombinedOutput(); err != nil {
		t.Skipf("no network namespaces here: %v %s", err, out)
	}
	t.Cleanup(func() { exec.Command("ip", "netns", "del", ns.name).Run() })
	ns.run("ip", "link", "set", "lo", "up")
	return ns
}

func (ns *namespace) args(command ...string) []string {
	return append([]string{"ip", "netns", "exec", ns.name}, command...)
}

func (ns *namespace) run(command ...string) {
	ns.t.Helper()
	args := ns.args(command...)
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		ns.t.Fatalf("%s: %v %s", strings.Join(command, " "), err, out)
	}
}

// daemon is a program that runs beside the test.
type daemon struct {
	cmd    *exec.Cmd
	stderr *bytes.Buffer
	done   chan struct{}
	err    error
}

func start(t *testing.T, cmd *exec.Cmd) *daemon {
	t.Helper()
	d := &daemon{cmd: cmd, stderr: &bytes.Buffer{}, done: make(chan struct{})}
	cmd.Stderr = d.stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		d.err = cmd.Wait()
		close(d.done)
	}()
	t.Cleanup(d.kill)
	return d
}

func (d *daemon) alive() bool {
	select {
	case <-d.done:
		return false
	default:
		return true
	}
}

func (d *daemon) kill() {
	d.cmd.Process.Kill()
	<-d.done
}

// serve starts the head node and waits until it serves.
func (s *site) serve(ns *namespace) *head {
	s.t.Helper()
	args := ns.args(s.bin, "serve", "--interface", "boot0")
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = s.dir
	h := &head{daemon: start(s.t.(*testing.T), cmd), t: s.t}
	waitFor(s.t, time.Minute, "the head node serves", func() bool {
		if !h.alive() {
			s.t.Fatalf("krgimage serve ended: %v\n%s", h.err, h.stderr.String())
		}
		_, _, err := s.try(10*time.Second, "nodes")
		return err == nil
	})
	return h
}

type head struct {
	*daemon
	t testing.TB
}

// stop ends the head node the way Ctrl-C does.
func (h *head) stop() {
	h.t.Helper()
	if err := h.cmd.Process.Signal(syscall.SIGINT); err != nil {
		h.t.Fatal(err)
	}
	select {
	case <-h.done:
	case <-time.After(30 * time.Second):
		h.t.Fatal("krgimage serve doesn't end on SIGINT")
	}
	if h.err != nil {
		h.t.Errorf("krgimage serve ended with %v on SIGINT:\n%s", h.err, h.stderr.String())
	}
}

// machine is a QEMU of the test's own.
type machine struct {
	*daemon
	monitor *os.File
}

// startUEFI starts a UEFI machine on the namespace's tap. Without an option ROM
// on its network card, the firmware boots by its own PXE stack.
func startUEFI(t *testing.T, s *site, ns *namespace, mac string) *machine {
	t.Helper()
	code, vars := firstFile("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_CODE.fd"), firstFile("/usr/share/OVMF/OVMF_VARS_4M.fd", "/usr/share/OVMF/OVMF_VARS.fd")
	if code == "" || vars == "" {
		t.Fatal("no UEFI firmware: apt-get install ovmf")
	}
	data, err := os.ReadFile(vars)
	if err != nil {
		t.Fatal(err)
	}
	ownVars, console := s.path("uefi.vars"), s.path("uefi.log")
	if err := os.WriteFile(ownVars, data, 0o600); err != nil {
		t.Fatal(err)
	}
	args := ns.args("qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "q35", "-accel", "tcg,thread=multi", "-m", "512",
		"-drive", "if=pflash,format=raw,unit=0,readonly=on,file="+code, "-drive", "if=pflash,format=raw,unit=1,file="+ownVars,
		"-netdev", "tap,id=n0,ifname=boot0,script=no,downscript=no", "-device", "virtio-net-pci,netdev=n0,romfile=,mac="+mac,
		"-device", "virtio-rng-pci", "-serial", "file:"+console, "-monitor", "stdio")
	cmd := exec.Command(args[0], args[1:]...)
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin = read
	m := &machine{start(t, cmd), write}
	t.Cleanup(func() {
		write.Close()
		if t.Failed() {
			if log, err := os.ReadFile(console); err == nil {
				t.Logf("end of the console:\n%s", log[max(0, len(log)-4000):])
			}
		}
	})
	return m
}

// reset presses the reset button.
func (m *machine) reset(t *testing.T) {
	t.Helper()
	if _, err := m.monitor.WriteString("system_reset\n"); err != nil {
		t.Fatal(err)
	}
}

func firstFile(names ...string) string {
	for _, name := range names {
		if _, err := os.Stat(filepath.Clean(name)); err == nil {
			return name
		}
	}
	return ""
}
