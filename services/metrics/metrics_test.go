package metrics

import (
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"krgimage/services/cluster"
	"krgimage/services/cluster/coordinator"
	"krgimage/services/cluster/wire"
	"krgimage/services/logs"
)

func TestCollector(t *testing.T) {
	d := NewDurations()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(d, Collector(Sources{
		Cluster: func() coordinator.Stats {
			return coordinator.Stats{
				Notes: map[cluster.Kind]uint64{cluster.NoteJoined: 3, cluster.NoteJoinFailed: 1},
				Loads: map[int]*wire.Load{2: {Load1: 1.5, MemoryFree: 1 << 20}},
			}
		},
		Members: func() cluster.Membership {
			return cluster.Membership{Revision: 9, Nodes: []cluster.Member{
				{ID: 1, State: cluster.Online, Hostname: "krg-1", Lost: true}, {ID: 2, State: cluster.Online, Hostname: "krg-2"}, {ID: 3, State: cluster.Present, Hostname: "krg-3", Slow: true},
			}}
		},
		Refused: func() map[string]uint64 { return map[string]uint64{"revoked": 2, "stale": 0} },
		Logs:    func() map[int]logs.Counts { return map[int]logs.Counts{2: {Kept: 10, Dropped: 4}} },
	}))
	d.Observe("join", 3*time.Second)
	want := `# HELP krgimage_cluster_events_total What happened to nodes.
# TYPE krgimage_cluster_events_total counter
krgimage_cluster_events_total{event="join_failed"} 1
krgimage_cluster_events_total{event="joined"} 3
# HELP krgimage_cluster_log_records_total Log records of nodes.
# TYPE krgimage_cluster_log_records_total counter
krgimage_cluster_log_records_total{node="2",result="dropped"} 4
krgimage_cluster_log_records_total{node="2",result="kept"} 10
# HELP krgimage_cluster_node_load1 A node's load average of the last minute.
# TYPE krgimage_cluster_node_load1 gauge
krgimage_cluster_node_load1{node="2"} 1.5
# HELP krgimage_cluster_node_memory_free_bytes Memory of a node that is available without swapping.
# TYPE krgimage_cluster_node_memory_free_bytes gauge
krgimage_cluster_node_memory_free_bytes{node="2"} 1.048576e+06
# HELP krgimage_cluster_node_state A node's state: 1 present, 2 online.
# TYPE krgimage_cluster_node_state gauge
krgimage_cluster_node_state{hostname="krg-1",node="1"} 2
krgimage_cluster_node_state{hostname="krg-2",node="2"} 2
krgimage_cluster_node_state{hostname="krg-3",node="3"} 1
# HELP krgimage_cluster_nodes Nodes by state.
# TYPE krgimage_cluster_nodes gauge
krgimage_cluster_nodes{state="online"} 2
krgimage_cluster_nodes{state="present"} 1
# HELP krgimage_cluster_nodes_lost Nodes without a connection to the head.
# TYPE krgimage_cluster_nodes_lost gauge
krgimage_cluster_nodes_lost 1
# HELP krgimage_cluster_nodes_slow Nodes that were not heard for a while, though their kernels answer.
# TYPE krgimage_cluster_nodes_slow gauge
krgimage_cluster_nodes_slow 1
# HELP krgimage_cluster_refused_total What was refused at admission and in handshakes.
# TYPE krgimage_cluster_refused_total counter
krgimage_cluster_refused_total{reason="revoked"} 2
krgimage_cluster_refused_total{reason="stale"} 0
# HELP krgimage_cluster_revision Revision of the membership.
# TYPE krgimage_cluster_revision gauge
krgimage_cluster_revision 9
`
	answer := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
	histogram, rest, _ := strings.Cut(answer.Body.String(), "# HELP krgimage_cluster_events_total")
	if got := "# HELP krgimage_cluster_events_total" + rest; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if !strings.Contains(histogram, `krgimage_cluster_duration_seconds_sum{what="join"} 3`) {
		t.Errorf("the histogram is\n%s", histogram)
	}
}
