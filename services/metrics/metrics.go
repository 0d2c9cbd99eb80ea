// Package metrics shows the cluster's counters on the head in Prometheus form.
//
//	krgimage_cluster_nodes{state}                  "present", "online"
//	krgimage_cluster_nodes_lost                    of these, without a connection
//	krgimage_cluster_nodes_slow                    of these, not heard for a while
//	krgimage_cluster_node_state{node,hostname}     1 present, 2 online
//	krgimage_cluster_node_load1{node}              load average of the last minute
//	krgimage_cluster_node_memory_free_bytes{node}
//	krgimage_cluster_revision                      of the membership
//	krgimage_cluster_events_total{event}           "joined", "died", "refused", ...
//	krgimage_cluster_refused_total{reason}         at admission and in handshakes
//	krgimage_cluster_log_records_total{node,result} "kept", "dropped"
//	krgimage_cluster_duration_seconds{what}        histogram: "save", "join", "leave", "request", ...
package metrics

import (
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"krgimage/services/cluster"
	"krgimage/services/cluster/coordinator"
	"krgimage/services/logs"
)

// Durations is the histogram of how long the cluster's operations take. It
// comes before the coordinator, whose Config.Observe is its Observe.
type Durations struct{ *prometheus.HistogramVec }

// NewDurations returns an empty histogram.
func NewDurations() Durations {
	return Durations{prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "krgimage_cluster_duration_seconds",
		Help: "How long an operation of the cluster took.",
		// A save is milliseconds, a join waits for the slowest container.
		Buckets: prometheus.ExponentialBuckets(0.0005, 4, 10), // 0.5 ms .. 131 s
	}, []string{"what"})}
}

// Observe notes that something took a time.
func (d Durations) Observe(what string, took time.Duration) {
	d.WithLabelValues(what).Observe(took.Seconds())
}

// Sources is where the figures come from when they are gathered.
type Sources struct {
	Cluster func() coordinator.Stats
	Members func() cluster.Membership
	Refused func() map[string]uint64   // by reason
	Logs    func() map[int]logs.Counts // by node
}

// Collector gathers the figures of the sources.
func Collector(s Sources) prometheus.Collector { return collector{s} }

type collector struct{ Sources }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("krgimage_cluster_"+name, help, labels, nil)
}

// Describe sends nothing: the series depend on which nodes there are.
func (c collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	m := c.Members()
	states := map[cluster.State]int{cluster.Present: 0, cluster.Online: 0}
	lost, slow := 0, 0
	nodeState := desc("node_state", "A node's state: 1 present, 2 online.", "node", "hostname")
	for _, n := range m.Nodes {
		states[n.State]++
		lost += oneIf(n.Lost)
		slow += oneIf(n.Slow)
		gauge(nodeState, float64(1+oneIf(n.State == cluster.Online)), strconv.Itoa(n.ID), n.Hostname)
	}
	nodes := desc("nodes", "Nodes by state.", "state")
	for state, n := range states {
		gauge(nodes, float64(n), string(state))
	}
	gauge(desc("nodes_lost", "Nodes without a connection to the head."), float64(lost))
	gauge(desc("nodes_slow", "Nodes that were not heard for a while, though their kernels answer."), float64(slow))
	gauge(desc("revision", "Revision of the membership."), float64(m.Revision))

	stats := c.Cluster()
	events := desc("events_total", "What happened to nodes.", "event")
	for kind, n := range stats.Notes {
		count(events, n, strings.ReplaceAll(string(kind), " ", "_"))
	}
	load := desc("node_load1", "A node's load average of the last minute.", "node")
	free := desc("node_memory_free_bytes", "Memory of a node that is available without swapping.", "node")
	for node, l := range stats.Loads {
		gauge(load, l.Load1, strconv.Itoa(node))
		gauge(free, float64(l.MemoryFree), strconv.Itoa(node))
	}
	refused := desc("refused_total", "What was refused at admission and in handshakes.", "reason")
	for reason, n := range c.Refused() {
		count(refused, n, reason)
	}
	records := desc("log_records_total", "Log records of nodes.", "node", "result")
	for node, n := range c.Logs() {
		count(records, n.Kept, strconv.Itoa(node), "kept")
		count(records, n.Dropped, strconv.Itoa(node), "dropped")
	}
}

func oneIf(b bool) int {
	if b {
		return 1
	}
	return 0
}
