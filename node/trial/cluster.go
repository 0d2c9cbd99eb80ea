package trial

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"krgimage/pxe/vnet"
)

// Cluster is a trial: machines, their network, and the ways in from outside.
type Cluster struct {
	opt     Options
	log     *slog.Logger
	accel   Accel
	network *vnet.Network
	nodes   []*Node
	ssh     map[int]net.Listener
	sockets string // directory of the control and console sockets
	own     bool   // it was made for this trial
	logs    []*os.File
	closing sync.Once

	mu     sync.Mutex
	rec    record          // guarded by mu
	boots  map[string]Boot // by MAC; guarded by mu
	change chan struct{}   // closed and replaced at each change; guarded by mu
}

// New prepares a trial: nothing runs yet, but all that it needs is there.
// Close or Run gives it back.
func New(ctx context.Context, opt Options) (_ *Cluster, err error) {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	if opt.Dir, err = filepath.Abs(opt.Dir); err != nil {
		return nil, err
	}
	switch last, err := running(opt.Dir); {
	case err == nil:
		return nil, fmt.Errorf("%w (process %d): 'krgimage trial stop' ends it", ErrRunning, last.Supervisor.PID)
	case !errors.Is(err, ErrNotRunning):
		return nil, err
	}
	last, err := loadRecord(opt.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	last.tidy()

	c := &Cluster{
		opt: opt, log: opt.Log.With("component", "trial"),
		boots: map[string]Boot{}, change: make(chan struct{}),
	}
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	install, err := Find(opt.UEFI)
	if err != nil {
		return nil, err
	}
	if opt.Accel != nil {
		c.accel = *opt.Accel
	} else if c.accel, err = Probe(ctx, install.QEMU); err != nil {
		return nil, err
	}
	c.log.Info("accelerator", "name", c.accel.Name, "reason", c.accel.Reason)
	if err := os.MkdirAll(opt.Dir, 0o755); err != nil {
		return nil, err
	}
	if c.sockets, c.own, err = vnet.SocketDir(opt.Dir); err != nil {
		return nil, fmt.Errorf("directory of the trial's sockets: %w", err)
	}
	c.network, err = vnet.New(vnet.Config{Head: opt.Head, Dir: c.sockets, Capture: opt.Capture, Log: opt.Log})
	if err != nil {
		return nil, err
	}
	ports := map[int]string{}
	for _, n := range last.Nodes {
		ports[n.ID] = n.SSH
	}
	if c.ssh, err = listenSSH(opt.Machines, ports); err != nil {
		return nil, err
	}
	c.rec = record{Started: time.Now(), Control: filepath.Join(c.sockets, "control.sock")}
	if c.own {
		c.rec.Sockets = c.sockets
	}
	for _, m := range opt.Machines {
		if err := c.add(m, install); err != nil {
			return nil, fmt.Errorf("node %d: %w", m.ID, err)
		}
	}
	return c, nil
}

// add gives machine m its port, its log and its UEFI variables.
func (c *Cluster) add(m Machine, install Install) error {
	name := fmt.Sprintf("node%d", m.ID)
	wire, err := c.network.Plug(name)
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(c.opt.Dir, name+".log"))
	if err != nil {
		return err
	}
	c.logs = append(c.logs, log)
	hw := hardware{Machine: m, Install: install, accel: c.accel.Args, memory: c.opt.Memory, cpus: c.opt.CPUs, wire: wire}
	if c.opt.UEFI {
		hw.vars = filepath.Join(c.opt.Dir, name+".vars")
		// Variables of another firmware build would stop it from booting.
		if err := os.Remove(hw.vars); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	c.nodes = append(c.nodes, newNode(hw, log, c.changed))
	c.rec.Nodes = append(c.rec.Nodes, recordNode{
		ID: m.ID, MAC: m.MAC.String(), Address: m.Address.String(),
		SSH: c.ssh[m.ID].Addr().String(), Console: filepath.Join(c.sockets, name+".console.sock"),
	})
	return nil
}

// Network is where the head node listens.
func (c *Cluster) Network() *vnet.Network { return c.network }

// Accel is how the machines run.
func (c *Cluster) Accel() Accel { return c.accel }

// Nodes are the machines, in the order of Options.
func (c *Cluster) Nodes() []*Node { return slices.Clone(c.nodes) }

// Node returns the machine with that id, or nil.
func (c *Cluster) Node(id int) *Node {
	for _, n := range c.nodes {
		if n.hw.ID == id {
			return n
		}
	}
	return nil
}

// Port is the machine's port on the switch, where its cable can be pulled.
func (c *Cluster) Port(id int) *vnet.Port { return c.network.Port(fmt.Sprintf("node%d", id)) }

// Run runs the trial until ctx ends, and then returns nil. It returns an error
// when the head node fails or a machine can't be started. In either case
// everything has ended and is given back when it returns.
func (c *Cluster) Run(ctx context.Context, head Head) (err error) {
	defer c.Close()
	me, err := identify(os.Getpid())
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.rec.Supervisor = me
	c.mu.Unlock()
	if err := c.save(); err != nil {
		return err
	}
	defer func() {
		c.mu.Lock()
		c.rec.Supervisor = nil
		for i := range c.rec.Nodes {
			c.rec.Nodes[i].QEMU = nil
		}
		c.mu.Unlock()
		if serr := c.save(); err == nil {
			err = serr
		}
	}()

	// The head outlives the machines: they may have to write to their root
	// while they shut down. So it doesn't see ctx, only its own end.
	group, running := errgroup.WithContext(context.WithoutCancel(ctx))
	running, stop := context.WithCancel(running)
	serving := make(chan struct{})
	group.Go(func() error {
		err := head.Run(running, sync.OnceFunc(func() { close(serving) }))
		if err == nil && running.Err() == nil {
			err = errors.New("ended by itself")
		}
		if err != nil && running.Err() == nil {
			return fmt.Errorf("head node: %w", err)
		}
		return nil
	})
	select {
	case <-serving:
		c.attend(running, group, head)
		if err := c.startAll(ctx); err != nil && ctx.Err() == nil {
			group.Go(func() error { return err })
		}
		select {
		case <-ctx.Done():
		case <-running.Done():
		}
	case <-ctx.Done():
	case <-running.Done():
	}
	c.stopAll(running)
	stop()
	return group.Wait()
}

// attend runs all that goes beside the machines.
func (c *Cluster) attend(ctx context.Context, group *errgroup.Group, head Head) {
	group.Go(func() error {
		for b := range head.Watch(ctx) {
			c.mu.Lock()
			c.boots[b.MAC] = b
			c.mu.Unlock()
			c.changed()
		}
		return nil
	})
	group.Go(func() error { return c.display(ctx) })
	group.Go(func() error { return c.serveControl(ctx) })
	for i, n := range c.nodes {
		to := netip.AddrPortFrom(n.hw.Address, guestSSH)
		group.Go(func() error {
			return forward(ctx, c.ssh[n.hw.ID], func(ctx context.Context) (net.Conn, error) { return c.network.DialTCP(ctx, to) })
		})
		group.Go(func() error {
			l, err := listenUnix(c.rec.Nodes[i].Console)
			if err != nil {
				return fmt.Errorf("console of node %d: %w", n.hw.ID, err)
			}
			return n.console.listen(ctx, l)
		})
	}
}

// startAll switches all machines on.
func (c *Cluster) startAll(ctx context.Context) error {
	var group errgroup.Group
	for _, n := range c.nodes {
		group.Go(func() error { return n.Start(ctx) })
	}
	return group.Wait()
}

// pressAgain is how long a machine may ignore its power button: one that is
// still starting has nobody listening to it yet.
const pressAgain = 2 * time.Second

// stopAll switches all machines off: by their power button when there is time
// and something to lose, then by cutting the power.
func (c *Cluster) stopAll(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, c.opt.Grace)
	defer cancel()
	var group sync.WaitGroup
	for _, r := range c.Report().Nodes {
		// Before a machine has its root mounted there is nothing it could lose.
		if n := c.Node(r.ID); slices.ContainsFunc(r.Stages, func(s StageTime) bool { return s.Stage == "root" }) {
			group.Go(func() { n.pressUntilOff(ctx) })
		}
	}
	group.Wait()
	for _, n := range c.nodes {
		n.Kill()
	}
}

// display keeps the board up to date and calls Options.Ready.
func (c *Cluster) display(ctx context.Context) error {
	var b *board
	if c.opt.Out != nil {
		b = newBoard(c.opt.Out, c.opt.Style, time.Now)
	}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	told := false
	for {
		changed := c.next()
		nodes := c.Report().Nodes
		if b != nil {
			b.show(nodes)
		}
		if !told && allReady(nodes) {
			told = true
			if c.opt.Ready != nil {
				c.opt.Ready(c.Report())
			}
		}
		// The clock of the live lines; without them only changes count.
		var clock <-chan time.Time
		if b != nil && b.drawn > 0 {
			clock = tick.C
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-clock:
		}
	}
}

func allReady(nodes []NodeReport) bool {
	return !slices.ContainsFunc(nodes, func(n NodeReport) bool { return n.Stage != "ready" })
}

// WaitReady waits until every machine is ready. A machine that gave up ends
// the wait with an error.
func (c *Cluster) WaitReady(ctx context.Context) error {
	return c.WaitFor(ctx, func(r Report) (bool, error) {
		for _, n := range r.Nodes {
			if n.Settled() && n.Stage != "ready" {
				return false, fmt.Errorf("node %d is %s: %s (its console: %s)", n.ID, n.Stage, n.Detail, n.Log)
			}
		}
		return allReady(r.Nodes), nil
	})
}

// WaitFor waits until done says so of the trial's state, looking at each
// change.
func (c *Cluster) WaitFor(ctx context.Context, done func(Report) (bool, error)) error {
	for {
		changed := c.next()
		if ok, err := done(c.Report()); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// Report is the state of the trial now.
func (c *Cluster) Report() Report {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := Report{PID: os.Getpid(), Started: c.rec.Started, Accel: c.accel, UEFI: c.opt.UEFI, Head: c.opt.Head}
	for i, n := range c.nodes {
		m := n.hw.Machine
		r.Nodes = append(r.Nodes, merge(NodeReport{
			ID: m.ID, Hostname: m.Hostname, MAC: m.MAC.String(), Address: m.Address,
			SSH: c.rec.Nodes[i].SSH, Console: c.rec.Nodes[i].Console,
			Log: filepath.Join(c.opt.Dir, fmt.Sprintf("node%d.log", m.ID)), Link: c.Port(m.ID).Up(),
		}, n.power(), c.boots[m.MAC.String()]))
	}
	return r
}

// next returns a channel that closes at the next change.
func (c *Cluster) next() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.change
}

// changed wakes who waits, and notes the machines' processes.
func (c *Cluster) changed() {
	c.mu.Lock()
	close(c.change)
	c.change = make(chan struct{})
	stale := false
	for i, n := range c.nodes {
		old, pid := c.rec.Nodes[i].QEMU, n.power().pid
		if (old == nil) == (pid == 0) && (old == nil || old.PID == pid) {
			continue
		}
		c.rec.Nodes[i].QEMU, stale = nil, true
		if pid != 0 {
			c.rec.Nodes[i].QEMU, _ = identify(pid)
		}
	}
	stale = stale && c.rec.Supervisor != nil
	c.mu.Unlock()
	if stale {
		if err := c.save(); err != nil {
			c.log.Warn("the trial's record is out of date: 'trial stop' may miss a process", "err", err)
		}
	}
}

func (c *Cluster) save() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.rec.save(c.opt.Dir); err != nil {
		return fmt.Errorf("write the trial's record: %w", err)
	}
	return nil
}

// Close gives back what New took. Run does it itself.
func (c *Cluster) Close() error {
	c.closing.Do(func() {
		for _, l := range c.ssh {
			l.Close()
		}
		if c.network != nil {
			c.network.Close()
		}
		for _, f := range c.logs {
			f.Close()
		}
		if c.own {
			os.RemoveAll(c.sockets)
		}
	})
	return nil
}
