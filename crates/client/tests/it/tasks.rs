//! Tasks: made, worked on, followed.

use trunkline_client::{
    Agent,
    task::{NewTask, TaskStatus},
};

use crate::server::{World, soon};

#[tokio::test]
async fn a_pool_task_is_worked_on_and_followed() {
    let world = World::begin().await;
    let worker = world.connect(Agent::builder("ws", "renderer", "one")).await;
    let hand = worker.clone();
    worker.handle(worker.assignments(), move |assignment| {
        let hand = hand.clone();
        async move {
            hand.tasks().complete(&assignment.task_id).await.unwrap();
        }
    });
    let agent = world.agent("a").await;
    let created = agent.tasks().create(NewTask::new("render").for_pool("renderer").payload("1")).await.unwrap();
    let mut events = agent.tasks().follow(&created.task_id, false).await.unwrap();
    while soon(agent.tasks().get(&created.task_id)).await.unwrap().status() != TaskStatus::Completed {
        soon(events.next()).await.unwrap();
    }
    agent.close().await;
    worker.close().await;
    world.end().await;
}
